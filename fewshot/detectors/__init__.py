"""Two-stage few-shot detectors: plain modules, losses in training, boxes in testing."""
