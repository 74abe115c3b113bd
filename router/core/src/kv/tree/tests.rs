use super::*;

const ANY: Search = Search {
    not_of: None,
    proven_only: false,
};

fn tree() -> PrefixTree {
    PrefixTree::new(
        Blocks(16),
        BlockSize::new(2).expect("not zero"),
        Seeded::default(),
    )
}

fn tokens(a: u32, b: u32) -> [TokenId; 2] {
    [TokenId(a), TokenId(b)]
}

fn adopt(tree: &mut PrefixTree, parent: u32, a: u32, block: u32) -> bool {
    let by = Origin {
        writer: SeqId(1),
        step: StepId(3),
        proven: false,
    };
    tree.adopt(BlockId(parent), &tokens(a, a), BlockId(block), by)
}

#[test]
fn a_key_is_parent_and_tokens_and_its_first_block_stays() {
    let mut tree = tree();
    assert!(adopt(&mut tree, 0, 7, 1));
    assert!(adopt(&mut tree, 1, 7, 2));
    assert!(!adopt(&mut tree, 0, 7, 3));
    assert_eq!(tree.get(BlockId(0), &tokens(7, 7), ANY), Some(BlockId(1)));
    assert_eq!(tree.get(BlockId(1), &tokens(7, 7), ANY), Some(BlockId(2)));
    assert_eq!(tree.get(BlockId(2), &tokens(7, 7), ANY), None);
    assert_eq!(tree.get(BlockId(0), &tokens(7, 8), ANY), None);
}

#[test]
fn tokens_are_compared_even_when_hashes_collide() {
    let mut tree = tree();
    assert!(adopt(&mut tree, 0, 7, 1));
    // As if the hash of 8 8 were that of 7 7.
    let key = tree.key(BlockId(0), &tokens(8, 8));
    tree.map.insert(key, BlockId(1));
    assert_eq!(tree.get(BlockId(0), &tokens(8, 8), ANY), None);
    assert!(!adopt(&mut tree, 0, 8, 2), "the newcomer's chain ends here");
}

#[test]
fn a_search_may_leave_out_this_step_and_what_is_not_proven() {
    let mut tree = tree();
    adopt(&mut tree, 0, 7, 1);
    let found = |tree: &PrefixTree, not_of, proven_only| {
        tree.get(
            BlockId(0),
            &tokens(7, 7),
            Search {
                not_of,
                proven_only,
            },
        )
    };
    assert_eq!(found(&tree, Some(StepId(3)), false), None);
    assert_eq!(found(&tree, Some(StepId(4)), false), Some(BlockId(1)));
    assert_eq!(found(&tree, None, true), None);
    tree.prove(BlockId(1));
    assert_eq!(found(&tree, None, true), Some(BlockId(1)));
}

#[test]
fn eviction_goes_from_leaves_to_the_root_least_recently_used_first() {
    let mut tree = tree();
    // Two branches below block 1: 1 - 2 - 3 and 1 - 4.
    for (parent, a, block) in [(0, 7, 1), (1, 7, 2), (2, 7, 3), (1, 9, 4)] {
        assert!(adopt(&mut tree, parent, a, block));
    }
    tree.lease(BlockId(1));
    for block in [3, 2, 1, 4, 1] {
        tree.unlease(BlockId(block));
    }
    tree.lease(BlockId(1));
    tree.lease(BlockId(2));
    tree.unlease(BlockId(2));
    tree.unlease(BlockId(1));
    let order: Vec<u32> = std::iter::from_fn(|| tree.evict())
        .map(|(block, _)| block.0)
        .collect();
    assert_eq!(order, [3, 4, 2, 1]);
    assert_eq!(tree.blocks(), Blocks(0));
}

#[test]
fn a_withdrawn_block_takes_its_descendants_along_and_leased_ones_go_back_last() {
    let mut tree = tree();
    for (parent, a, block) in [(0, 7, 1), (1, 7, 2), (2, 7, 3), (1, 9, 4)] {
        assert!(adopt(&mut tree, parent, a, block));
    }
    // Nobody leases 2 and 3 below it; 1 and 4 are leased.
    tree.unlease(BlockId(3));
    tree.unlease(BlockId(2));
    let mut gone = Vec::new();
    tree.withdraw(BlockId(1), |block| gone.push(block.0));
    gone.sort_unstable();
    assert_eq!(gone, [2, 3]);
    assert_eq!((tree.blocks(), tree.unleased()), (Blocks(0), Blocks(0)));
    assert!(tree.unlease(BlockId(4)), "its last lease gives it back");
    assert!(tree.unlease(BlockId(1)));
}
