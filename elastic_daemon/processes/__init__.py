"""The processes of a deployment, and what they say to each other."""
