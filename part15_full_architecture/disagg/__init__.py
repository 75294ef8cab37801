"""A proxy in front of engines that compute prompts and engines that answer: the router, with roles."""
