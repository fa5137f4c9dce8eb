"""A NumPy reference of the whole forward, one image at a time, written from the paper."""

import numpy as np
import pytest
import torch

from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification


def erf(x):
    return torch.erf(torch.from_numpy(x)).numpy()


class Reference:
    """The network in float64 with plain loops over heads and queries; it shares only the weights with the model."""

    def __init__(self, model: VisualPerceiverForImageClassification):
        self.w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
        self.c = model.config

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.c.layer_norm_eps)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def mlp(self, x, name):
        h = self.linear(x, f"{name}.fc1")
        return self.linear(0.5 * h * (1 + erf(h / np.sqrt(2))), f"{name}.fc2")

    def attention(self, q, k, v, heads):
        d = q.shape[-1] // heads
        y = np.zeros((len(q), q.shape[-1]))
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for i in range(len(q)):
                scores = k[:, part] @ q[i, part] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                y[i, part] = weights / weights.sum() @ v[:, part]
        return y

    def read(self, queries, inputs, name, heads):
        q = self.linear(self.norm(queries, f"{name}.norm_queries"), f"{name}.query")
        k, v = np.split(self.linear(self.norm(inputs, f"{name}.norm_inputs"), f"{name}.key_value"), 2, axis=-1)
        return self.attention(q, k, v, heads)

    def finish(self, queries, y, name):
        x = queries + self.linear(y, f"{name}.proj")
        return x + self.mlp(self.norm(x, f"{name}.norm"), f"{name}.mlp")

    def __call__(self, image, K, threshold):
        c, p, prefix = self.c, self.c.patch_size, "visual_perceiver."
        patches = [
            image[:, y : y + p, x : x + p].reshape(-1)
            for y in range(0, image.shape[1], p)
            for x in range(0, image.shape[2], p)
        ]
        name = f"{prefix}embeddings.patch_embeddings.projection"
        kernel = self.w[f"{name}.weight"].reshape(c.hidden_size, -1)
        inputs = np.stack(patches) @ kernel.T + self.w[f"{name}.bias"]
        inputs = inputs + self.w[f"{prefix}embeddings.position_embeddings"][0]

        queries = self.w[f"{prefix}cross_attention.queries"][:K]
        y = self.read(queries, inputs, f"{prefix}cross_attention", c.num_cross_attention_heads)
        keep = list(range(K))
        if threshold is not None:
            unit = y / np.linalg.norm(y, axis=-1, keepdims=True)
            keep = [i for i in range(K) if all(unit[i] @ unit[j] <= threshold for j in range(i))]
        x = self.finish(queries[keep], y[keep], f"{prefix}cross_attention")
        for i in range(c.num_hidden_layers):
            layer = f"{prefix}layers.{i}"
            q, k, v = np.split(self.linear(self.norm(x, f"{layer}.norm1"), f"{layer}.attention.qkv"), 3, axis=-1)
            x = x + self.linear(self.attention(q, k, v, c.num_attention_heads), f"{layer}.attention.proj")
            x = x + self.mlp(self.norm(x, f"{layer}.norm2"), f"{layer}.mlp")
        output_query = self.w[f"{prefix}decoder.queries"]
        z = self.read(output_query, x, f"{prefix}decoder", c.num_attention_heads)
        z = self.norm(self.finish(output_query, z, f"{prefix}decoder"), f"{prefix}norm")
        return self.linear(z[0], "head"), keep


@pytest.mark.parametrize(("K", "threshold"), [(64, None), (1, None), (13, None), (64, 0.5), (64, 0.9), (20, 0.7)])
def test_the_trained_model_agrees(trained, K, threshold):
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        output = trained(images, num_active_queries=K, dqs_threshold=threshold)
    reference = Reference(trained)
    for image, logits, active in zip(images, output.logits, output.active_queries, strict=True):
        expected, keep = reference(image.double().numpy(), K, threshold)
        assert active.nonzero().flatten().tolist() == keep
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def test_a_fresh_model_with_several_cross_attention_heads_agrees():
    from support import small_config

    model = VisualPerceiverForImageClassification(small_config(num_cross_attention_heads=2)).eval()
    image = torch.randn(1, 3, 16, 16)
    expected, keep = Reference(model)(image[0].double().numpy(), 12, 0.3)
    output = model(image, dqs_threshold=0.3)
    assert output.active_queries[0].nonzero().flatten().tolist() == keep
    np.testing.assert_allclose(output.logits[0].detach().numpy(), expected, atol=1e-4)
