"""OpenAI's HTTP API, and a page, on the gateway's own process; every request is one of the Gateway service's."""
