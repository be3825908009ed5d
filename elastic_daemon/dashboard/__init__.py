"""`/dashboard`: a page for operators. It has no data of its own: its scripts ask the daemon's other routes."""

from elastic_daemon.dashboard.routes import make_dashboard_router

__all__ = ["make_dashboard_router"]
