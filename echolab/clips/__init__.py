"""Clips: which prefixes of verified successes are worth learning again, and how sets of them are made."""
