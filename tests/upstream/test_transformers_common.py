"""transformers' common model and config tests on the Visual Perceiver."""

import unittest
from unittest.mock import patch

from torch import nn
from upstream_transformers import test_modeling_common as upstream
from upstream_transformers.test_configuration_common import ConfigTester

from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification, VisualPerceiverModel


# By these upstream tells which classes return no loss, and which take class indices as labels.
KINDS = {
    "MODEL_MAPPING_NAMES": VisualPerceiverModel,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": VisualPerceiverForImageClassification,
}
for name, model_class in KINDS.items():
    setattr(upstream, name, {**getattr(upstream, name), VisualPerceiverConfig.model_type: model_class.__name__})


class VisualPerceiverModelTester:
    """Small configs and inputs, with the names that upstream's tests expect."""

    # Images, queries, patches and widths all differ in number, so that no mixed-up dimension goes unseen.
    batch_size = 5
    image_size = 16
    patch_size = 4
    num_channels = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    intermediate_size = 37
    num_queries = 10
    seq_length = num_queries
    is_training = True

    def get_config(self) -> VisualPerceiverConfig:
        names = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_queries")
        names += ("num_attention_heads", "intermediate_size")
        fields = {name: getattr(self, name) for name in names}
        return VisualPerceiverConfig(**fields, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": upstream.floats_tensor(shape)}


class VisualPerceiverModelTest(upstream.ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(KINDS.values())
    test_resize_embeddings = False  # no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # upstream reads the year from a copyright line

    def setUp(self):
        self.model_tester = VisualPerceiverModelTester()
        self.config_tester = ConfigTester(
            self, config_class=VisualPerceiverConfig, has_text_modality=False, hidden_size=36
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # Upstream's asks for an nn.Embedding; images have a projection of patches in its place.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), nn.Module)
            embeddings = nn.Identity()
            model.set_input_embeddings(embeddings)
            assert model.get_input_embeddings() is embeddings
            assert model.get_output_embeddings() is None

    def test_model_outputs_equivalence(self):
        # Upstream subtracts outputs, which booleans do not allow.
        active_queries = VisualPerceiverModel.active_queries
        with patch.object(VisualPerceiverModel, "active_queries", lambda *args: active_queries(*args).int()):
            super().test_model_outputs_equivalence()
