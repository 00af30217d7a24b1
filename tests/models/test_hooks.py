"""Test that hooks on any module see what it returned, and that nothing else changes."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from engine.losses import mean_loss, network_logits
from helpers.networks import network as made
from helpers.networks import photographs, scramble
from helpers.tiny_networks import largest_difference, network, one_step, pictures, results
from models.layers import has_hooks

LEVELS = pytest.mark.parametrize("level", range(5))
FORMS = ("BC", "basic, dropout", "ImageNet", "one block")
OTHERS = {
    "resnet": "--netType resnet --depth 8",
    "resnet-imagenet": "--netType resnet --dataset imagenet --imageSize 72 --depth 50",
    "preresnet": "--netType preresnet --depth 11 --bottleneck true",
    "wideresnet": "--netType wideresnet --depth 10 --widen 0.5 --dropRate 0.3",
    "nin": "--netType nin --widen 0.05",
    "allcnn": "--netType allcnn --widen 0.05",
    "dsn": "--netType dsn --widen 0.05",
    "highway": "--netType highway --widen 0.1",
    "fractalnet": "--netType fractalnet --depth 11 --columns 2 --widen 0.1",
}


class Watch:
    """Put hooks of every kind on modules, and compare later with what they were given."""

    KINDS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")

    def __init__(self, modules: dict[str, nn.Module], kinds: tuple[str, ...] = KINDS):
        self.seen = {kind: [] for kind in kinds}
        self.tensors = []
        self._stack = ExitStack()
        for name, module in modules.items():
            for kind in kinds:
                handle = getattr(module, f"register_{kind}")(self._note(kind, name))
                self._stack.enter_context(handle)

    def _note(self, kind: str, name: str):
        def note(_, *values) -> None:
            self.seen[kind].append(name)
            if kind.startswith("forward"):
                found = values[-1] if isinstance(values[-1], tuple) else values[-1:]
                tensors = [each for each in found if isinstance(each, torch.Tensor)]
                self.tensors += [(each, each.detach().clone()) for each in tensors]

        return note

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        # What a module returned has not been overwritten.
        assert all(torch.equal(each.detach(), copy) for each, copy in self.tensors)


def callable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules but those that only hold others."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, nn.ModuleList)
    }


@LEVELS
@pytest.mark.parametrize("form", FORMS)
def test_every_hook_is_called_in_training_and_changes_no_result(level, form):
    (images, targets), model = pictures(form), network(level, form)
    modules = callable_modules(model)
    with Watch(modules) as watch:
        got = one_step(model, images, targets)
    for names in watch.seen.values():
        assert sorted(names) == sorted(modules)
    assert largest_difference(got, one_step(network(0, form), images, targets)) < 1e-10
    assert largest_difference(one_step(network(level, form), images, targets), got) < 1e-10


@LEVELS
@pytest.mark.parametrize("form", FORMS)
def test_every_hook_is_called_in_evaluation_with_gradients(level, form):
    (images, _), model = pictures(form), network(level, form).eval()
    modules = callable_modules(model)
    with Watch(modules) as watch:
        logits = model(images.requires_grad_())
        logits[:, 0].sum().backward()
    for names in watch.seen.values():
        assert sorted(names) == sorted(modules)
    plain = network(0, form).eval()
    plain(twin := images.detach().clone().requires_grad_())[:, 0].sum().backward()
    pair = [results(*each) for each in ((model,), (plain,))]
    assert largest_difference(*pair) < 1e-10
    assert (images.grad - twin.grad).abs().max() < 1e-10 < twin.grad.abs().max()


PARTS = ("features", "features.norm5", "features.transition1.conv", "relu5", "global_pool",
         "features.denseblock1.denselayer2.norm1")  # fmt: skip
MAPS = dict.fromkeys(("features", "features.norm5", "relu5"), (5, 18, 6, 5))  # others differ


@LEVELS
@pytest.mark.parametrize("part", PARTS)
def test_one_hook_is_called_without_gradients_and_the_rest_runs_as_before(level, part):
    (images, _), model = pictures(), network(level).eval()
    with torch.no_grad():
        want = model(images)
        with Watch({part: model.get_submodule(part)}, Watch.KINDS[:2]) as watch:
            got = model(images)
    assert watch.seen == {kind: [part] for kind in Watch.KINDS[:2]}
    assert (got - want).abs().max() < 1e-10
    assert part not in MAPS or watch.tensors[-1][0].shape == MAPS[part]


@pytest.mark.parametrize("level", [2, 3, 4])
def test_a_block_without_hooks_runs_as_one_function_beside_one_that_has_some(level):
    model, (images, _) = network(level), pictures()

    def functions() -> int:
        found, queue = set(), [model(images).grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in found:
                found.add(node)
                queue += [each for each, _ in node.next_functions]
        return sum("DenseBlock" in type(node).__name__ for node in found)

    assert functions() == 2
    for part, left in {**dict.fromkeys(PARTS, 1), "features.conv0": 2, "classifier": 2}.items():
        with model.get_submodule(part).register_forward_hook(lambda *_: None):
            assert functions() == left, part
    with torch_module.register_module_forward_hook(lambda *_: None):
        assert functions() == 0
    assert functions() == 2


@pytest.mark.parametrize("kind", Watch.KINDS)
def test_hooks_of_every_kind_are_found(kind):
    model = nn.Sequential(nn.Linear(1, 1))
    assert not has_hooks(model)
    with getattr(model[0], f"register_{kind}")(lambda *_: None):
        assert has_hooks(model) and not has_hooks(model, inside=False)
    with getattr(torch_module, f"register_module_{kind}")(lambda *_: None):
        assert has_hooks(model, inside=False)
    assert not has_hooks(model)


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # the list of DSN's heads
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("line", OTHERS.values(), ids=OTHERS)
def test_every_hook_of_every_other_network_is_called(line, training):
    torch.manual_seed(0)
    size = 72 if "imagenet" in line else 32
    images, targets = photographs(2, size)
    model, twin = (scramble(made(line)).double().train(training) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    modules = callable_modules(model)
    unused = () if training else ("companions",)
    wanted = sorted(name for name in modules if not name.startswith(unused))
    is_list = training and "dsn" in line  # PyTorch finds no tensor in it
    losses = []
    with Watch(modules) as watch:
        for each in (model, twin):
            torch.manual_seed(1)
            outputs = each(images.clone().requires_grad_())
            losses.append(mean_loss(F.cross_entropy, outputs, targets))
            losses[-1].backward()
            if each is model:
                assert network_logits(outputs).shape == (2, 10)
    for kind, names in watch.seen.items():
        skips_root = is_list and "backward" in kind
        assert sorted(names) == (wanted[1:] if skips_root else wanted)
    assert losses[0] == losses[1] and largest_difference(results(model), results(twin)) == 0


@LEVELS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_network_cut_behind_the_last_relu_has_lost_nothing(level, training):
    (images, _), model = pictures(), network(level).train(training)
    *body, pool, classifier = model.children()
    cut = classifier(pool(nn.Sequential(*body)(images)))
    assert [name for name, _ in model.named_children()][1] == "relu5"
    assert (cut - model(images)).abs().max() < 1e-10
    without = classifier(pool(model.features(images)))  # as where the ReLU is no module
    assert (cut - without).abs().max() > 1e-2


def test_an_overwritten_output_would_be_noticed():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)).double()
    with pytest.raises(AssertionError), Watch({"conv": model[0]}, ("forward_hook",)):
        model(pictures()[0])


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)


@LEVELS
def test_features_may_be_wrapped_replaced_or_emptied(level):
    (images, _), model = pictures(), network(level).eval()
    want, features = model(images), model.features
    for change in (Wrapped, nn.Sequential, lambda inner: nn.Sequential(*inner)):
        model.features = change(features)
        assert (model(images) - want).abs().max() < 1e-10
    model.features = nn.Conv2d(3, 18, 1).double()
    assert model(images).shape == want.shape
    for count in (0, 1):
        model.features = features[:count]
        with pytest.raises(RuntimeError, match="shape"):  # of the classifier's input
            model(images)


@LEVELS
def test_a_hook_that_writes_into_an_input_gets_its_gradient(level):
    def grads(level: int, factor: float = 1.5) -> dict[str, torch.Tensor]:
        (images, targets), model = pictures(), network(level)
        layer = model.features.denseblock1.denselayer2
        layer.register_forward_pre_hook(lambda _, args: (args[0].mul_(factor),))
        model.features.denseblock2.denselayer1.register_module("nothing", None)
        return one_step(model, images, targets)

    assert largest_difference(grads(level), grads(0)) < 1e-10
    assert largest_difference(grads(level), grads(0, 1.4)) > 1e-3


@LEVELS
@pytest.mark.parametrize("library", ["captum", "pytorch_grad_cam"])
def test_gradient_methods_of_other_libraries_run_on_every_layer_and_agree_with_level_0(
    library, level
):
    peer = pytest.importorskip(library)
    images = pictures("ImageNet")[0][:2].float()

    def maps(level: int, name: str) -> torch.Tensor:
        model = network(level, "ImageNet").float().eval()
        layer = model.get_submodule(name)
        if library == "captum":
            found = peer.attr.LayerGradCam(model, layer).attribute(images, target=1)
            return found.detach()
        target = pytest.importorskip("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
        with peer.GradCAM(model=model, target_layers=[layer]) as cam:
            return torch.from_numpy(cam(images.clone(), [target(1)] * 2))

    parts = [f"features.{name}" for name, _ in network(0, "ImageNet").features.named_children()]
    for part in ["features", *parts, "relu5", "features.denseblock1.denselayer2.norm2"]:
        want, got = maps(0, part), maps(level, part)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max() and want.abs().max() > 0, part
