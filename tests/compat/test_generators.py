import torch

from lightning_largescale import compat


class Generators(compat.DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.key = compat.generator_key(kwargs["generator"])
        return func(*args, **kwargs)


def test_generator_key():
    own = torch.Generator()
    for generator in (own, torch.default_generator):
        with Generators() as seen:
            torch.rand(2, generator=generator)
        assert seen.key == compat.generator_key(generator)
    assert compat.generator_key(own) != compat.generator_key(torch.default_generator)


def test_marked_state_and_mark_of():
    generator = torch.Generator().manual_seed(2**40 + 7)
    torch.rand(5, generator=generator)
    assert compat.mark_of(generator.get_state()) is None
    for number in (0, 2**33 + 5):
        marked = compat.marked_state(generator.get_state(), number)
        generator.set_state(marked)
        assert torch.equal(generator.get_state(), marked)
        assert compat.mark_of(generator.get_state()) == number
        assert generator.initial_seed() == 2**40 + 7
    torch.rand(1000, generator=generator)
    assert compat.mark_of(generator.get_state()) is None
