"""The operations that a plan consists of, and fitters, which compute tensors from the rest of the merged model."""
