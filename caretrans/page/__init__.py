"""A static page that checks, measures and runs exported networks in a browser."""
