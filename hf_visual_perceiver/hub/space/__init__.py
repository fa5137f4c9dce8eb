"""A Gradio app that shows what the two knobs do to one image, locally or as a Space on the Hub.

`demo` computes, `draw` renders the results, `app` lays out the page and `repository` uploads it to the Hub. Only `app`
imports Gradio (the extra `demo`).
"""
