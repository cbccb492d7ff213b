"""LINA: masked autoregressive text-to-image generation with gated linear attention.

The tiny model's own parts are here too: captioned shapes to train it on, the checker that says whether a picture shows
what its caption asks for, a small autoencoder and a word-level text encoder.
"""
