"""Answers over HTTP, in the way of OpenAI's API: api.py reads requests, worker.py drives the engine, app.py serves."""
