"""What a request passes before it is served: the socket, TLS, sizes, keys, the bounded queue."""
