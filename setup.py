"""The compiled loops of lvppl.mixtures; everything else is in setup.cfg.

Optional: without a C compiler that knows GCC's vectors, torch does the same work.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lvppl.mixtures._native",
            sources=["lvppl/mixtures/native/mixture.c", "lvppl/mixtures/native/kmeans.c"],
            depends=[
                f"lvppl/mixtures/native/{name}.h"
                for name in ("for_each_processor", "mixture_loops", "kmeans_types", "kmeans_loops")
            ],
            extra_compile_args=[
                "-std=gnu11", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
                "-Wno-psabi",
            ],
            optional=True,
        )
    ]
)  # fmt: skip
