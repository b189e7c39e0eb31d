"""An OpenAI-compatible server over the decode engine; `app.serve` runs it, `app.create_app` gives it to another ASGI server."""
