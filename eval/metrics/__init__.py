"""Image and feature metrics: PSNR, SSIM, FID."""
