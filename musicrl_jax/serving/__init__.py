"""A bundle and what plays it over HTTP."""
