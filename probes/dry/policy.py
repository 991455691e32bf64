"""Which operations CUDA's autocast casts, as ATen/autocast_mode.h lists them (torch 2.11), under
the names that Python calls them by."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# AT_FORALL_LOWER_PRECISION_FP
LOWER = _words(
    "conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "_convolution prelu addmm addmv addr matmul __matmul__ __rmatmul__ einsum mm mv vecdot linear "
    "addbmm baddbmm bmm chain_matmul multi_dot lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "scaled_dot_product_attention"
)
# AT_FORALL_FP32
FLOAT32 = _words(
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ "
    "softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm "
    "cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d nll_loss_nd "
    "hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss "
    "multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss "
    "binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d "
    "_upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa "
    "upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa"
)
# AT_FORALL_FP32_SET_OPT_DTYPE: the kernel reads 16 bits and writes fp32
SET_DTYPE = _words("prod softmax log_softmax cumprod cumsum vector_norm matrix_norm sum norm")
# AT_FORALL_PROMOTE
PROMOTE = _words(
    "addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put tensordot scatter_add"
)
