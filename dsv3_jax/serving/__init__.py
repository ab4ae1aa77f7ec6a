"""The OpenAI protocol over the continuous batching engine.

    protocol   requests checked, answers put together
    chat       messages to tokens
    app        the ASGI application

Needs the `serve` extra (starlette, uvicorn, jinja2).
"""
