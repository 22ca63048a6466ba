"""Serves concept banks: a Ray Serve application behind gRPC."""
