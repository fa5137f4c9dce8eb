"""A Gradio app that classifies an image at any K and t, locally or as a Space on the Hub.

`demo` computes, `draw` renders the results, `app` lays out the page and `repository` uploads it to the Hub. Only `app`
imports Gradio (the extra `demo`).
"""
