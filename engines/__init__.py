"""From a spec to a running, ready, watched inference engine. Never imports `gateway`."""
