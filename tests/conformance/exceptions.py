"""What the name of a field cannot tell, by config class and by model class; each line makes a class build, or small."""

from typing import Any

BY_CONFIG: dict[str, dict[str, Any]] = {
    # Tables of blocks, whose widths are inside.
    "PPLCNetV3Config": {"scale": 0.25},
    "UVDocBackboneConfig": {
        "resnet_head": ((3, 8), (8, 8)),
        "resnet_configs": (((8, 8, 1, False),), ((8, 16, 1, True),), ((16, 32, 1, True),)),
        "stage_configs": (((32, 1),), ((32, 2),), ((32, 5),), ((32, 8),), ((32, 12),), ((32, 18), (32, 6))),
    },
    "UVDocConfig": {"bridge_connector": (32, 32), "out_point_positions2D": ((32, 8), (8, 2))},
    "MobileNetV1Config": {"depth_multiplier": 0.25},
    "VibeVoiceAcousticTokenizerConfig": {"num_filters": 4, "depths": (1, 1, 1), "downsampling_ratios": (2, 4)},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 4, "depths": (1, 1, 1), "downsampling_ratios": (2, 4)},
    "VibeVoiceAcousticTokenizerDecoderConfig": {"num_filters": 4, "depths": (1, 1, 1), "downsampling_ratios": (2, 4)},
    "MuseSparkAudioConfig": {
        "num_hidden_layers": 2,
        "hidden_sizes": (16, 32),
        "patch_sizes": (16, 6),
        "depths": (1, 1),
    },
    "JanusVQVAEConfig": {"channel_multiplier": (1, 1, 2)},
    "Emu3VQVAEConfig": {"channel_multiplier": (1, 1)},
    # Whose tensors are stored in other pieces.
    "Dinov2WithRegistersConfig": {"use_swiglu_ffn": True},
    # Values that a default config lacks.
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5}},
    "Emu3Config": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6}},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "4/8",
    },
    "Sapiens2HeadConfig": {
        "upsample_out_channels": [16, 16],
        "conv_out_channels": [16],
        "scale_conv_out_channels": [16],
        "scale_final_hidden_sizes": [16, 16],
    },
    "RfDetrConfig": {"backbone_config": {"model_type": "rf_detr_dinov2", "use_swiglu_ffn": True}},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "split_ngram_parts": 4,
        "eos_token_id": 2,
    },
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxAttentionConfig": {"rope_theta": 1e4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 48},
    # Sizes that depend on each other in a way of their own.
    "BitConfig": {"num_groups": 8},
    "Mamba2Config": {"num_heads": 8},
    "Cosmos3EdgeTextConfig": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "NeoMMEConfig": {"head_dim": 16},
    "BridgeTowerConfig": {"hidden_size": 128},
    "BridgeTowerTextConfig": {"hidden_size": 128},
    "BridgeTowerVisionConfig": {"hidden_size": 128},
    "CvtConfig": {"depth": (1, 2, 3)},
    "Ernie4_5_VLMoeTextConfig": {"head_dim": 128},
    "MobileBertConfig": {"embedding_size": 16},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Glm5NextTextConfig": {"index_topk": 16},
    "ZambaConfig": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2 + ["linear_attention"],
    },
}
BY_MODEL: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}
