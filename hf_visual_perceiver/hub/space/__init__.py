"""A Gradio app that shows what the two knobs do to one image, locally or as a Space on the Hub.

`demo` computes, `draw` makes what is shown, `app` lays it out, `repository` puts it on the Hub. Gradio, the extra `demo`, is
imported by `app` alone.
"""
