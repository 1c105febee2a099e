"""Explainers for any model of either zoo. This version has none yet; CHANGELOG.md tells what each version adds."""
