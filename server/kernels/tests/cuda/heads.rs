use stoker_kernels::{AttentionShape, Norm, add_bias, cuda::Heads, norm_heads};

use crate::support::{Errors, Random, device, floats};

#[test]
fn heads_get_their_bias_and_norms() {
    let Some(d) = device("heads_get_their_bias_and_norms") else {
        return;
    };
    let mut errors = Errors::default();
    let mut random = Random(26);
    for head_size in [64, 96, 128] {
        let shape = AttentionShape {
            heads: 6,
            kv_heads: 2,
            head_size,
            window: None,
        };
        let width = shape.qkv_width();
        for (rows, biased, normed) in [(1, true, false), (5, false, true), (9, true, true)] {
            let bias = random.values(width);
            let norms = [(); 2].map(|()| random.values(head_size));
            let halves = random.halves(rows * width);
            let mut expected = floats(&halves);
            if biased {
                add_bias(&mut expected, width, &bias).unwrap();
            }
            if normed {
                let [query, key] = norms.clone().map(|weight| Norm {
                    weight,
                    epsilon: 1e-6,
                });
                norm_heads(&mut expected, width, shape, &query, &key).unwrap();
            }
            let qkv = d.buffer(&halves);
            let bias = d.buffer(&bias);
            let norms = norms.map(|norm| d.buffer(&norm));
            let heads = Heads {
                bias: biased.then_some(bias.all()),
                norms: normed.then_some([norms[0].all(), norms[1].all()]),
                epsilon: 1e-6,
            };
            d.kernels
                .finish_heads(&d.stream, rows, shape, qkv.all(), heads)
                .unwrap();
            let found = floats(&qkv.all().read().unwrap());
            let what = format!("{head_size}, {rows} rows");
            errors.compare(&what, &found, &expected, 1.0, 1e-3);
        }
    }
    errors.finish("heads_get_their_bias_and_norms");
}
