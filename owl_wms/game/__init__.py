"""Holds the game that the package renders: real frames for the autoencoder, and a world for the world model to learn.

`world` has the rules, `render` draws a state, `controls` plays by script.
"""
