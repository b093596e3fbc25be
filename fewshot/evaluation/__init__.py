"""Tests: of classifiers by tasks, of detectors by average precision."""
