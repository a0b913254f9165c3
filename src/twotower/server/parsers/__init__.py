"""Parsers of replies: reasoning and tool calls in the text of a model. They are independent of the routes."""
