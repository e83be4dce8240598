"""The demo: a page of Gradio, on this machine or as a Space."""
