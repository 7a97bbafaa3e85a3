"""Concept customization: methods that teach a text-to-image model new concepts, one after another, from a few pictures each."""
