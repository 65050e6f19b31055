"""`.meta` files: a graph's nodes, how its variables are saved and restored, and its collections.

Pure functions on the messages of :mod:`gpusaver.protos`; TensorFlow's own messages are taken wherever one is expected.

::

    tensors.py      TensorProto <-> NumPy array
    nodes.py        one NodeDef; names that are free; inputs such as "w:0" and "^w"
    variables.py    the nodes of a variable, and its VariableDef
    saver_nodes.py  the nodes that a Saver adds, and its SaverDef
    collections.py  CollectionDef <-> Python values
    building.py     a MetaGraphDef for variables alone
    reading.py      a file, or a message, checked; the variables that its Saver restores
"""
