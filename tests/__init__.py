"""The tests of lvppl; they mirror the library, and share :mod:`tests.programs`."""
