"""The backend for servers with the OpenAI API."""
