"""Rewards in, advantages out."""
