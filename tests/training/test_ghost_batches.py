"""Ghost batches against batch normalisation written out by hand."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ride_timm.models.fused import norm as fused_norm
from ride_timm.training.ghost_batches import forward_in_parts


def _network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten()).double()


def _normalised(x):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize(("ghost", "sizes"), [(4, (4, 4, 4)), (5, (4, 4, 4)), (7, (6, 6)), (11, (6, 6)), (12, (12,))])
def test_ghost_batches_have_own_statistics_and_the_first_is_tracked(ghost, sizes):
    network = _network()
    images = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    feature_maps = network[0](images)
    expected = torch.cat([_normalised(part) for part in feature_maps.split(list(sizes))]).flatten(1)
    assert_close(forward_in_parts(network, network, images, ghost), expected)
    first = feature_maps[: sizes[0]]
    assert_close(network[1].running_mean, 0.1 * first.mean((0, 2, 3)))
    assert_close(network[1].running_var, 0.9 + 0.1 * first.var((0, 2, 3)))
    assert network[1].num_batches_tracked == 1 and network[1].track_running_stats


def test_gradients_sum_over_ghost_batches():
    network, images = _network(), torch.randn(6, 3, 5, 5, dtype=torch.float64)
    weights = torch.randn(6, 100, dtype=torch.float64)
    (forward_in_parts(network, network, images, 3) * weights).sum().backward()
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        (network(images[part]) * weights[part]).sum().backward()
    assert_close(found, [parameter.grad for parameter in network.parameters()])


def test_batch_is_complete_in_eval_mode_or_without_a_size():
    network, images = _network().eval(), torch.randn(6, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(forward_in_parts(network, network, images, 2), network(images))
    expected = _normalised(network[0](images)).flatten(1)
    assert_close(forward_in_parts(network, network.train(), images, None), expected)


def test_fused_norms_track_the_first_ghost_batch_only(uncompiled):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(8)
    fused = deepcopy(plain)
    images = torch.randn(4, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert fused_norm._fits(fused, images[:2], None)
    ours = forward_in_parts(lambda part: fused_norm.norm_relu([fused], [part])[0], fused, images, 2)
    assert_close(ours, forward_in_parts(lambda part: plain(part).relu(), plain, images, 2), rtol=1e-5, atol=1e-5)
    assert_close(fused.state_dict(), plain.state_dict())


def test_tracking_is_restored_after_a_failure():
    network = _network()
    calls = []

    def fail_second(part):
        calls.append(part)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return network(part)

    with pytest.raises(RuntimeError, match="stop"):
        forward_in_parts(fail_second, network, torch.randn(4, 3, 5, 5, dtype=torch.float64), 2)
    assert network[1].track_running_stats
