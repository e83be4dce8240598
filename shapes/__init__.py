"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""
