import pytest
import torch

from deepfuse.ir.provider import Provider, at_most, choose


def _provider(name: str, *, refuses: str | None = None, inline: bool = False, **priority: int) -> Provider:
    return Provider(name=name, fn=lambda *args: name, priority=priority, supports=lambda *args: refuses, inline=inline)


REFERENCE = _provider("reference", cpu=0, cuda=0, inline=True)


def _chosen(*providers: Provider, device_type: str = "cpu", **how) -> tuple[str, tuple[tuple[str, str], ...]]:
    choice = choose([REFERENCE, *providers], (), device_type, **how)
    return choice.provider.name, choice.refused


def test_the_highest_priority_of_the_device_runs():
    low, high = _provider("low", cpu=1, cuda=9), _provider("high", cpu=2, cuda=5)
    assert _chosen(low, high) == ("high", ())
    assert _chosen(low, high, device_type="cuda") == ("low", ())


def test_of_equal_priorities_the_first_provided_runs():
    assert _chosen(_provider("first", cpu=3), _provider("second", cpu=3)) == ("first", ())


def test_a_device_that_is_not_named_is_not_served():
    triton = _provider("triton", cuda=10)
    assert _chosen(triton) == ("reference", ())
    assert _chosen(triton, forced="triton") == ("reference", (("triton", "runs on cuda, not on cpu"),))


def test_those_that_refuse_are_passed_over_with_their_reasons():
    picky, pickier = _provider("picky", cpu=2, refuses="too odd"), _provider("pickier", cpu=3, refuses="too even")
    assert _chosen(picky, pickier) == ("reference", (("pickier", "too even"), ("picky", "too odd")))


def test_the_arguments_decide():
    small = Provider(name="small", fn=len, priority={"cpu": 1}, supports=lambda x: None if len(x) < 3 else "x is long")
    assert choose([REFERENCE, small], ("ab",), "cpu").provider is small
    assert choose([REFERENCE, small], ("abc",), "cpu").refused == (("small", "x is long"),)


def test_inline_providers_are_for_compiled_graphs_but_for_the_reference():
    inline = _provider("inline", cpu=5, inline=True)
    assert _chosen(inline) == ("reference", (("inline", "is made for compiled graphs only"),))
    assert _chosen(inline, forced="inline") == ("reference", (("inline", "is made for compiled graphs only"),))
    assert _chosen(inline, compiled=True) == ("inline", ())


def test_a_forced_provider_goes_before_all_priorities_but_not_before_its_own_refusal():
    fast, slow = _provider("fast", cpu=9), _provider("slow", cpu=1)
    assert _chosen(fast, slow, forced="slow") == ("slow", ())
    assert _chosen(fast, slow, forced="reference") == ("reference", ())
    assert _chosen(fast, _provider("no", cpu=1, refuses="no"), forced="no") == ("fast", (("no", "no"),))


def test_an_unknown_forced_provider_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"want a provider out of \['reference', 'fast'\], got 'fats'"):
        _chosen(_provider("fast", cpu=9), forced="fats")


def test_a_reference_that_refuses_is_our_bug():
    with pytest.raises(AssertionError, match="the reference refused"):
        choose([_provider("reference", cpu=0, refuses="no")], (), "cpu")


def test_a_size_is_at_most_a_limit_only_if_it_is_known():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    assert at_most(4, 4) and not at_most(5, 4)
    shapes = ShapeEnv()
    assert not at_most(shapes.create_unbacked_symint(), 2**40)
    assert not shapes.guards
    assert not at_most(torch.ones(2).sum(), 4)
