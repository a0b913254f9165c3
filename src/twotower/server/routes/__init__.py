"""The routes of the server beside those that generate text: one module for each kind."""
