"""Image generation: captured graphs, their codes and host synchronisations, and planted faults."""

import torch
from emulated_cuda import host_copy, measure

from open_unitok.generation import Sampling, generate_image_codes, image_sampling
from open_unitok.generation.sampling import GumbelNoise

from .parts import error_of, load_conftest, planted

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SEEDS = [1, 2, 3]
SAMPLINGS = {
    "guided": Sampling(guidance=3.0, guidance_schedule="linear"),
    "greedy": Sampling(guidance=3.0, greedy=True),
    "top_k_p": Sampling(guidance=2.0, top_k=5, top_p=0.8, temperature=0.7),
    "unguided": Sampling(guidance=1.0),
}
tiny_model = load_conftest("generation").tiny_model


def _generate(model, sampling=SAMPLINGS["guided"], **options):
    return generate_image_codes(model, PROMPTS, sampling, SEEDS, UNCONDITIONAL, **options)


def scenario_samplings() -> dict:
    """Captured, eager and CPU codes of every kind of sampling."""
    found = {}
    for context, names in (("full", SAMPLINGS), ("last", ("guided",))):
        on_cpu = tiny_model(visual_context=context)
        model = tiny_model(visual_context=context).to("cuda")
        for name in names:
            sampling = SAMPLINGS[name]
            captured, report = measure(_generate, model, sampling)
            eager = _generate(model, sampling, backend="torch")
            report["equal"] = torch.equal(host_copy(captured), host_copy(eager))
            report["equal_to_cpu"] = torch.equal(host_copy(captured), _generate(on_cpu, sampling))
            found[f"{name}, context {context}"] = report
    return found


def scenario_planted_cpu_arange() -> str:
    """An index tensor on the CPU."""
    model = tiny_model().to("cuda")
    embedder = model.visual_embedder
    embed = type(embedder).embed

    def with_fault(self, codes, *args, **kwargs):
        return embed(self, codes + torch.arange(codes.shape[-1]), *args, **kwargs)

    with planted(type(embedder), "embed", with_fault):
        return error_of(lambda: _generate(model, backend="torch"))


def scenario_planted_cpu_generator() -> str:
    """Noise from a generator of the CPU."""
    model, original = tiny_model().to("cuda"), GumbelNoise.__init__

    def with_fault(self, seeds, *args, **kwargs):
        original(self, seeds, *args, **kwargs)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    with planted(GumbelNoise, "__init__", with_fault):
        return error_of(lambda: _generate(model))


def scenario_planted_item() -> dict:
    """A wait for the device in the captured step; the codes come without a graph, on the caller's stream."""
    model, original = tiny_model().to("cuda"), image_sampling.sample_visual_token

    def with_fault(backend, sampling, guidance, noise, codes, check=None):
        original(backend, sampling, guidance, noise, codes, check)
        assert codes.max().item() >= 0

    with planted(image_sampling, "sample_visual_token", with_fault):
        codes, report = measure(_generate, model)
    equal = torch.equal(host_copy(codes), _generate(tiny_model()))
    return {**report, "equal": equal, "stream": torch.cuda.current_stream().stream_id}
