"""Metrics of images and features: PSNR, SSIM, FID, Inception Score, KID, VQAScore."""
