"""HTTP server with the OpenAI endpoints and a web page, over one engine: `twotower serve`."""
