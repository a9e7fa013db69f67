"""Small studies of the objectives, each one command; nothing of the training run imports them."""
