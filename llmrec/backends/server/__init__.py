"""The backend for servers that speak OpenAI's protocol."""
