"""`penstock bench`: a load test of any OpenAI-compatible server. Shares nothing with the gateway but `wire.sse`."""
