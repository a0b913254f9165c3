"""The Responses API of OpenAI (`/v1/responses`), without storage: a wire format around the path of a chat."""
