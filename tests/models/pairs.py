"""What holds of every model with layers of latents, named by its ``sites``, and its guide."""

import pyro
import torch
from pyro import poutine

import lvppl

__all__ = ["fit_moves_every_parameter", "keeps_dtype_and_device", "particles_equal_a_loop"]


def fit_moves_every_parameter(model, guide, y):
    programs = (*model.named_parameters(), *guide.named_parameters())
    before = [(name, p.detach().clone()) for name, p in programs]
    lvppl.SVI(model, guide, objective=lvppl.IWAE(num_particles=3)).fit(y, num_epochs=2)
    after = (*model.parameters(), *guide.parameters())
    for (name, old), new in zip(before, after, strict=True):
        assert not torch.equal(old, new), name


def particles_equal_a_loop(model, guide, y):
    """Every site's ln p and ln q under a plate of particles, and of each particle alone."""
    with pyro.plate("particles", 3, dim=-2):
        drawn = poutine.trace(guide).get_trace(y)
        together = poutine.trace(poutine.replay(model, drawn)).get_trace(y)
    for trace, program in ((drawn, guide), (together, model)):
        trace.compute_log_prob()
        for i in range(3):
            values = {site: drawn.nodes[site]["value"][i] for site in model.sites}
            alone = poutine.trace(poutine.condition(program, values)).get_trace(y)
            alone.compute_log_prob()
            for site in [*model.sites, "y"][: len(model.sites) + (program is model)]:
                want, got = (t.nodes[site]["log_prob"] for t in (alone, trace))
                torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


def keeps_dtype_and_device(model, guide, y):
    """Draws have the shape of the data; terms have their dtype, on a device of shapes alone."""
    drawn = poutine.trace(poutine.uncondition(model)).get_trace(y)
    drawn.compute_log_prob()
    assert drawn.nodes["y"]["value"].shape == y.shape
    pyro.clear_param_store()
    model.to("meta"), guide.to("meta")
    with pyro.validation_enabled(False):
        for program in (model, guide):
            trace = poutine.trace(program).get_trace(y.to("meta"))
            trace.compute_log_prob()
            for site in model.sites:
                assert trace.nodes[site]["log_prob"].device.type == "meta"
                assert trace.nodes[site]["log_prob"].dtype == y.dtype
