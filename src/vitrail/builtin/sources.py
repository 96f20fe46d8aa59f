"""The papers that measures come from, as the declarations name them."""

__all__ = ["FROM_LI", "FROM_NGUYEN", "OURS_AFTER_MA", "PAPER_LI", "PAPER_MA", "PAPER_NGUYEN"]

FROM_LI = "Li et al. 2023 (arXiv 2303.13731)"
FROM_NGUYEN = "Nguyen et al. 2022 (arXiv 2210.07646)"
OURS_AFTER_MA = "our construction, after Ma et al. 2022 (arXiv 2203.05922)"

PAPER_LI = (
    "Yiran Li, Junpeng Wang, Xin Dai, Liang Wang, Chin-Chia Michael Yeh, Yan Zheng, Wei Zhang, Kwan-Liu Ma: How "
    "Does Attention Work in Vision Transformers? A Visual Analytics Attempt. IEEE Transactions on Visualization "
    "and Computer Graphics, 2023. arXiv 2303.13731"
)
PAPER_MA = (
    "Jie Ma, Yalong Bai, Bineng Zhong, Wei Zhang, Ting Yao, Tao Mei: Visualizing and Understanding Patch "
    "Interactions in Vision Transformer. IEEE Transactions on Neural Networks and Learning Systems, 2023. "
    "arXiv 2203.05922"
)
PAPER_NGUYEN = (
    "Van-Anh Nguyen, Khanh Pham Dinh, Long Tung Vuong, Thanh-Toan Do, Quan Hung Tran, Dinh Phung, Trung Le: Vision "
    "Transformer Visualization: What Neurons Tell and How Neurons Behave? 2022. arXiv 2210.07646"
)
