"""Data sets, files and minibatches.

:func:`digits`, :func:`geyser`, :func:`photographs`
    embedded: no file, no network.
:func:`mnist`, :func:`chorales`
    from ``$LVPPL_DATA``, the user's cache folder or a public mirror; verified in each case.
:func:`load`
    ``.npz``, ``.npy``, ``.csv``, or a folder of ``.png`` and ``.jpg`` images.
:class:`Minibatches`
    fresh random minibatches, drawn on the device.
"""

from lvppl.data.batches import Minibatches
from lvppl.data.chorales import Chorales, Sequences, chorales
from lvppl.data.embedded import digits, geyser, photographs
from lvppl.data.files import Loaded, load
from lvppl.data.handwriting import mnist
from lvppl.data.records import Images, Split, Table

__all__ = [
    "Chorales",
    "Images",
    "Loaded",
    "Minibatches",
    "Sequences",
    "Split",
    "Table",
    "chorales",
    "digits",
    "geyser",
    "load",
    "mnist",
    "photographs",
]
