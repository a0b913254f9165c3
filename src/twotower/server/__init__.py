"""An HTTP server with the OpenAI endpoints over one engine, and a page to see it think: `twotower serve`."""
