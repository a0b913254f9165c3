"""The Messages API of Anthropic (`/v1/messages`): a wire format around the path of a chat."""
